"""Pages and tables about runs, from what the run folder holds and nothing else.

``write_report`` writes RUN/report.html, ``compare`` sets runs side by side. A page is one HTML
file without scripts or requests; its ``<data>`` elements have the exact numbers.
"""

from __future__ import annotations

from flexlora.report.compare import compare
from flexlora.report.page import write_report

__all__ = ["compare", "write_report"]
