"""Pages and tables about runs, from their run folders only.

``write_report`` writes RUN/report.html, ``compare`` compares runs. A page is one HTML
file without scripts or requests; its ``<data>`` elements have the exact numbers.
"""

from __future__ import annotations

from flexlora.report.compare import compare
from flexlora.report.page import write_report

__all__ = ["compare", "write_report"]
