"""One released link: a .pt file of tensors, read without running anything in it, and written.

Knows what the tensors of each type are called and how large they are; knows nothing of systems, roles or manifests.
"""

import pickletools
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from recursivemas.errors import CheckpointError
from recursivemas.links import RecursiveLink
from recursivemas.release.layout import design_of, released_config, tensor_name, type_of

# What the unpickler says of a file that would call something; of a file that is merely broken it says other things,
# but it also says "unsupported operand" of both.
_SIGNS_OF_CODE = ("unsupported global", "unsupported class", "torchscript", "can only build")
_CALLS = {"GLOBAL", "STACK_GLOBAL", "INST"}
_LFS_POINTER = b"version https://git-lfs"


def load_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors in a .pt file. Nothing in it is run.

    Raises `CheckpointError` if it is missing, truncated, holds code, or anything but real floating-point tensors.
    """
    if not file.is_file():
        raise CheckpointError(f"{file} is missing; restore it from where the release came from")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # an unpickler that is fed damaged or hostile bytes may raise anything
        raise CheckpointError(_why_unreadable(file, " ".join(str(error).split()) or type(error).__name__)) from None
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(f"{file} holds a {type(content).__name__}, expected a dictionary of tensors")
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor) or not _is_plain(tensor):
            raise CheckpointError(f"{file}: '{name}' is no plain tensor, and a link consists of nothing else")
        if not tensor.is_floating_point():
            kind = str(tensor.dtype).removeprefix("torch.")
            raise CheckpointError(f"{file}: {name} is of type {kind}, expected floating-point numbers")
    return dict(content)


def _why_unreadable(file: Path, reason: str) -> str:
    """What to say of a file that the unpickler refused."""
    with file.open("rb") as stream:
        if stream.read(len(_LFS_POINTER)) == _LFS_POINTER:
            return f"{file} is a pointer of git-lfs and not the file itself; get it with `git lfs pull`"
    if any(sign in reason.lower() for sign in _SIGNS_OF_CODE) or (
        "unsupported operand" in reason.lower() and _calls(file)
    ):
        return (
            f"{file} holds code beside its tensors, or is pickled in a way in which it may; it was not run, and the "
            "file is refused. A link is a plain dictionary of tensors: get it from where the release came from"
        )
    return (
        f"{file} cannot be read ({reason[:120]}): it is truncated or no file of tensors; restore it from where the "
        "release came from"
    )


def _calls(file: Path) -> bool:
    """Whether the pickle in a file names anything to call. It is looked through, not run."""
    content = file.read_bytes()
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            pickles = [name for name in archive.namelist() if name.endswith("data.pkl")]
            content = archive.read(pickles[0]) if pickles else b""
    try:
        return any(operation.name in _CALLS for operation, _, _ in pickletools.genops(content))
    except Exception:  # bytes that are no pickle
        return False


def read_released_link(
    file: Path,
    kind: str,
    adapter_type: str,
    *,
    described_in: Path,
    in_dim: int | None = None,
    out_dim: int | None = None,
) -> RecursiveLink:
    """The link in a .pt file, in float32, of the type and widths that the JSON file `described_in` gives.

    Raises `CheckpointError` naming file and field where the two disagree, or where weights are not finite.
    """
    design = design_of(kind, adapter_type, str(described_in))
    tensors = load_tensors(file)
    rows, columns = _widths(file, tensors)
    for field, declared, found in (("in_dim", in_dim, columns), ("out_dim", out_dim, rows)):
        if declared is not None and declared != found:
            raise CheckpointError(
                f"{described_in} says {field} {declared}, but the tensors in {file} have {found}; is it the file of "
                "another link?"
            )
    if kind == "inner" and rows != columns:
        raise CheckpointError(f"{file} maps {columns}-wide states to {rows}-wide ones, so it is no inner link")
    config = released_config(kind, design, columns, rows)
    with torch.device("meta"):
        link = RecursiveLink(config)
    expected = {tensor_name(kind, name): tuple(tensor.shape) for name, tensor in link.named_parameters()}
    found_shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in sorted(expected.keys() | found_shapes.keys()):
        if expected.get(name) != found_shapes.get(name):
            have = f"has the shape {found_shapes[name]}" if name in found_shapes else "is missing"
            want = f"should be {expected[name]}" if name in expected else "should not be there"
            raise CheckpointError(
                f"{file}: {name} {have}, but {want} in a link whose adapter_type is '{adapter_type}', as "
                f"{described_in} says"
            )
    weights = {name: tensors[tensor_name(kind, name)].float().contiguous() for name, _ in link.named_parameters()}
    for name, tensor in weights.items():
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{file}: {tensor_name(kind, name)} holds numbers that are not finite (NaN or inf)")
    link.load_state_dict({**weights, "scale": torch.ones(())}, assign=True)
    return link.requires_grad_(False).eval()


def _is_plain(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and tensor.device.type == "cpu"


def _widths(file: Path, tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    """Output and input width of a link, from its first and its last layer."""
    shapes = []
    for name in ("proj2.weight" if "proj2.weight" in tensors else "proj1.weight", "proj1.weight"):
        if name not in tensors or tensors[name].dim() != 2:
            raise CheckpointError(f"{file} has no matrix {name}, which every link of this kind has")
        shapes.append(tensors[name].shape)
    return shapes[0][0], shapes[1][1]


def released_tensors(name: str, link: RecursiveLink) -> tuple[str, dict[str, Tensor]]:
    """The released type of a link and its tensors, with `scale` folded in; the function stays the same.

    A narrower MLP is filled up with zeros. Raises `CheckpointError` with the reason where the released types have no
    such form; `name` is what to call the link then.
    """
    config = link.config
    adapter_type = type_of(config)
    if adapter_type is None:
        raise _refusal(name, f"there is no released type for an {config.kind} link of the design {config.design}")
    form = released_config(config.kind, config.design, config.source_size, config.target_size)
    width = link.w1.out_features
    with torch.device("meta"):
        needed = RecursiveLink(form).w1.out_features
    if width > needed:
        raise _refusal(
            name,
            f"its MLP is {width} wide, and that of the released type {adapter_type} is {needed} wide; train it with "
            f"intermediate_size {needed}",
        )
    scale = link.scale.detach().cpu()
    if scale != 1 and config.kind == "inner" and link.design.residual and not link.design.layer_norm:
        raise _refusal(
            name,
            f"its scale is {scale.item():g}, and the released types cannot scale the identity of an inner link; use "
            "the design ln-res-2-layer",
        )
    last = ("target_norm",) if link.design.layer_norm else ("w2", "w3") if link.w2 is not None else ("w1", "w3")
    plain = RecursiveLink(form)
    ours = dict(link.named_parameters())
    tensors: dict[str, Tensor] = {}
    for key, target in plain.named_parameters():
        filled = torch.zeros_like(target)
        if key in ours:
            given = ours[key].detach().float().cpu()
            filled[tuple(slice(size) for size in given.shape)] = given
        factor = scale if key.split(".")[0] in last else 1.0
        tensors[tensor_name(config.kind, key)] = filled.detach() * factor
    return adapter_type, tensors


def _refusal(name: str, reason: str) -> CheckpointError:
    return CheckpointError(f"the link '{name}' cannot be written in the released layout: {reason}")
