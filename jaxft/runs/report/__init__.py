"""The page of runs or of a comparison: one HTML file, drawings and data in it, that opens from disk without a network.

page = RUN/report.html                    written by `jaxft train` and `jaxft compare` at their end
write_report(page, [RUN, ...])            what `jaxft report` does
"""

from jaxft.runs.report.levers import comparison_page
from jaxft.runs.report.page import page_of
from jaxft.runs.report.reading import Run, read_run
from jaxft.runs.report.writing import PAGE, write_report, write_run_page

__all__ = [
    "PAGE",
    "Run",
    "comparison_page",
    "page_of",
    "read_run",
    "write_report",
    "write_run_page",
]
