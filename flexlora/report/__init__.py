"""Pages and tables about runs, from what the run folder holds and nothing else.

``write_report`` writes RUN/report.html, ``compare`` sets runs side by side. A page is one HTML
file without scripts and without a single request; exact numbers stand in its ``<data>`` elements.
"""

from __future__ import annotations

from flexlora.report.compare import compare
from flexlora.report.page import write_report

__all__ = ["compare", "write_report"]
