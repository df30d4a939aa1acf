"""The same plans with TensorRT's own program: command lines for ``trtexec`` of TensorRT 10 and 11, and files for it.

Shapes are given by profile, each after ``--profile=N``. ``--stronglyTyped`` is needed up to TensorRT 10, and does
nothing in 11.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from export.engines.options import Options
from export.engines.plan import Plan
from runtime.backends.plugin_library import VARIABLE
from runtime.bundle.engines import FOLDER, WEIGHTS, build_command
from runtime.bundle.manifest import DECODER_GRAPH
from runtime.bundle.reader import Bundle
from runtime.console.files import replaced
from runtime.errors import BundleError, OptionError


def write_graphs(bundle: Bundle, plans: tuple[Plan, ...], folder: Path, overwrite: bool) -> None:
    """Writes the edited graphs and links to their weights, which a graph names as files in its own folder.

    Raises:
        OptionError: the folder is the bundle, or has such files already.
        BundleError: it cannot be written.
    """
    if folder.resolve() == bundle.folder.resolve():
        raise OptionError(f"--write-onnx {folder} is the bundle itself: choose another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for plan in plans:
            weights = folder / WEIGHTS[plan.graph]
            for file in (weights, folder / plan.graph):
                if os.path.lexists(file) and not overwrite:
                    raise OptionError(f"{file} exists already: choose another folder, or add --overwrite")
            with replaced(weights) as link, replaced(folder / plan.graph) as partial:
                partial.write_bytes(plan.model.SerializeToString(deterministic=True))
                link.symlink_to(bundle.path(weights.name).resolve())
    except OSError as error:
        raise BundleError(f"{folder} cannot be written: {error.strerror}") from None


def script(bundle: Bundle, options: Options, plans: tuple[Plan, ...], folder: Path | None) -> str:
    """Returns commands for a shell on the device: write the graphs, where ``folder`` is None; build; register.

    Where there is no plugin library here, the commands take that of the device from the environment variable.
    """
    given = ("--sm", options.capability, "--max-length", options.max_length, "--max-batch", options.max_batch)
    command = partial(build_command, options.target, options.capability, bundle.folder, *given)
    lines = []
    if folder is None:
        folder = Path(f"{bundle.folder.resolve().name}-onnx")
        lines += [command("--write-onnx", folder), ""]
    lines.append(shlex.join(["mkdir", "-p", str(bundle.path(FOLDER))]))
    for plan in plans:
        arguments = [shlex.quote(text) for text in _options(bundle, plan, folder)]
        if plan.graph == DECODER_GRAPH:
            library = f'"${VARIABLE}"' if options.plugin is None else shlex.quote(str(options.plugin))
            arguments.insert(2, f"--staticPlugins={library}")
        lines += ["", " \\\n  ".join(["trtexec", *arguments])]
    plugin = () if options.plugin is None else ("--plugin", options.plugin)
    lines += ["", command("--register", *(bundle.path(plan.name) for plan in plans), *plugin)]
    return "\n".join(lines)


def _options(bundle: Bundle, plan: Plan, folder: Path) -> Iterator[str]:
    yield f"--onnx={folder / plan.graph}"
    yield f"--saveEngine={bundle.path(plan.name)}"
    yield "--stronglyTyped"
    yield "--skipInference"
    for index, profile in enumerate(plan.profiles):
        yield f"--profile={index}"
        for place, bound in enumerate(("min", "opt", "max")):
            shapes = (f"{name}:{'x'.join(map(str, shapes[place]))}" for name, shapes in profile.items())
            yield f"--{bound}Shapes={','.join(shapes)}"
