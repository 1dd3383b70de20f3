"""``docs/families.md`` against the families themselves.

Every run compares the dense families, a kind of each other verdict, and a quarter of the rest that
changes with the day; all of them are compared, and the table is written, by
``python tests/support/family_table.py``.
"""

import datetime

import pytest
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from family_checks import examined
from family_configs import families
from family_table import DENSE, read_table, row_of

TABLE = read_table()
