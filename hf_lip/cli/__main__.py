# SPDX-License-Identifier: Apache-2.0
from hf_lip.cli import app


app()
