"""Where the checkout and the handed-over model configurations lie."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "tests" / "support" / "configs"
SUPPORT = ROOT / "tests" / "support"
