"""Small runs, and what they share."""

from __future__ import annotations

from tests.small_runs import (
    compiled_once as compiled_once,
)
from tests.small_runs import (
    programs as programs,
)
from tests.small_runs import (
    promotion as promotion,
)
from tests.small_runs import (
    shared_programs as shared_programs,
)
from tests.small_runs import (
    unplotted as unplotted,
)
