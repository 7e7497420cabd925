# SPDX-License-Identifier: Apache-2.0
"""The checkpoint that `pipeline("certify")` and `hf-lip certify` use when none is named."""

from pathlib import Path


DEFAULT_MODEL_DIR = Path(__file__).parent / "digits"
