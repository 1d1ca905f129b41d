"""Where large reference values and published weights lie; tests skip where they are absent."""

import os
import pathlib

_BESIDE = pathlib.Path(__file__).resolve().parents[3] / "shared" / "fixtures"

# Values that the PyTorch programs computed: $REPULSOR_JAX_FIXTURES, or beside the checkout.
FOLDER = pathlib.Path(os.environ.get("REPULSOR_JAX_FIXTURES") or _BESIDE)
# Published weights and photographs, in the folder beside it.
DATA = FOLDER.parent / "data"
