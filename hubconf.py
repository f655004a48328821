"""For torch.hub: `torch.hub.load(REPO, "sdsen", weights="photographs")`, a module that derains images; see docs/USE.md.

The modules of config/ have names that the caller's own may have, such as `model`. So they are imported as parts of a
package with a name of its own, and nothing is added to sys.path.
"""

import builtins as _builtins
import importlib.util as _util
import pathlib as _pathlib
import sys as _sys
import types as _types
import zlib as _zlib

dependencies = ["torch", "numpy", "cv2", "tqdm"]

_CONFIG = _pathlib.Path(__file__).resolve().parent / "config"
_PACKAGE = f"sdsen_{_zlib.crc32(bytes(_CONFIG)):08x}"  # another one for each checkout
_OWN = {path.stem for path in _CONFIG.iterdir() if path.suffix in ("", ".py")}


def _module(name: str):
    """The module of config/ of that name, such as "base.files", in this package; `base` before it."""
    _sys.modules.setdefault(_PACKAGE, _types.ModuleType(_PACKAGE))
    full, (parent, _, last) = f"{_PACKAGE}.{name}", name.rpartition(".")
    if full not in _sys.modules:
        place = _CONFIG.joinpath(*name.split("."))
        spec = _util.spec_from_file_location(full, place / "__init__.py" if place.is_dir() else f"{place}.py")
        if parent:
            _module(parent)
        module = _sys.modules[full] = _util.module_from_spec(spec)
        vars(module)["__builtins__"] = {**vars(_builtins), "__import__": _import}
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del _sys.modules[full]
            raise
        if parent:
            setattr(_sys.modules[f"{_PACKAGE}.{parent}"], last, module)
    return _sys.modules[full]


def _import(name: str, globals=None, locals=None, fromlist=(), level=0):
    """What an import statement in config/ calls: its own modules are those of the package."""
    top = name.partition(".")[0]
    if top not in _OWN:
        return _builtins.__import__(name, globals, locals, fromlist, level)
    module = _module(name)
    for each in fromlist or ():
        if not hasattr(module, each):  # `from base import ranks`
            _module(f"{name}.{each}")
    return module if fromlist else _module(top)


def sdsen(weights: str = "photographs"):
    """A torch.nn.Module: RGB images (N, 3, H, W) in [0, 1], of any size -> the same without rain.

    `weights`: photographs, rain800, rain100h or rain800_fast (docs/WEIGHTS.md), compared with models/SHA256SUMS. It is
    on the fastest device (cuda, mps, cpu) and takes images from any. It computes no gradients.
    """
    return _module("runs.derain").load(weights)
