# SPDX-License-Identifier: Apache-2.0
"""Write a copy of a checkpoint whose layers have certified spectral norms of at most C.

    python scripts/rescale_checkpoint.py microsoft/resnet-50 --to 1 --preserve-logits --out resnet-50-unit
    python scripts/rescale_checkpoint.py path/to/vit --mode sr --to 2 --layers 'vit.encoder.*' --out vit-sr
    python scripts/rescale_checkpoint.py path/to/sequential --preserve-logits --chain 0,2,5,7 --out rescaled

The same as `hf-lip rescale`; --help lists the options. In Python: `hf_lip.checkpoints.rescale.rescale_checkpoint`.
"""

import typer

from hf_lip.cli.rescale_command import rescale


if __name__ == "__main__":
    typer.run(rescale)
