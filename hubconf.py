"""For ``torch.hub.load``, from a clone or from GitHub:

spnn = torch.hub.load("path/to/clone", "spnn", source="local")                # the demo's, 64x64
spnn = torch.hub.load("path/to/clone", "spnn", "yamitehr/SPNN", source="local")
prior = torch.hub.load("path/to/clone", "prior", source="local")
"""

from pathlib import Path

from DDNM.guided_diffusion.prior import Prior, load_prior
from models import SPNN

dependencies = ["diffusers", "huggingface_hub", "numpy", "safetensors", "torch", "yaml"]
_DEMO = Path(__file__).resolve().parent / "DDNM" / "exp" / "logs" / "faces"


def spnn(weights: str | Path | None = None, **options) -> SPNN:
    """A pseudo-invertible classifier of faces in eval mode.

    Args:
        weights: a file, a folder or a hub id; None: the demo's.
        options: as `SPNN.from_pretrained` takes them.
    """
    return SPNN.from_pretrained(_DEMO / "spnn.safetensors" if weights is None else weights, **options)


def prior(weights: str | Path | None = None, **options) -> Prior:
    """A frozen diffusion prior ``eps(x, t)``.

    Args:
        weights: a folder, a file or a hub id; None: the demo's.
        options: as `load_prior` takes them.
    """
    return load_prior(_DEMO / "prior" if weights is None else weights, **options)
