"""The page of runs: one HTML file, drawings and data in it, that opens from disk without a network."""

from jaxft.runs.report.page import PAGE, page_of, write_page
from jaxft.runs.report.reading import Run, read_run

__all__ = ["PAGE", "Run", "page_of", "read_run", "write_page"]
