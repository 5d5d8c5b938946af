"""The options that commands share, each group handed to the command as one ready value."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import click

from faceage.cli.output import Output
from faceage.detect import DetectConfig
from faceage.engines.base import Precision, Runtime
from faceage.engines.registry import BACKENDS, BackendName, choose_runtime
from faceage.models import DEFAULT_MODEL, list_models
from faceage.pipeline.request import AGE_LIMITS_YEARS, AgeRequest, Networks, load_networks
from faceage.pipeline.workers import Cluster, Here, Processes, Workers

if TYPE_CHECKING:
    from faceage.agers.base import Composite

AGE = click.FloatRange(*AGE_LIMITS_YEARS)


def group(argument: str, make: Callable[..., object], *options: Callable) -> Callable[[Callable], Callable]:
    """Return a decorator that adds options and passes what `make` makes of their values as `argument`."""
    names = list(signature(make).parameters)

    def decorate(command: Callable) -> Callable:
        @functools.wraps(command)
        def run(**params: object) -> object:
            values = {name: params.pop(name) for name in names}
            try:
                made = make(**values)
            except ValueError as error:
                raise click.UsageError(str(error)) from error
            return command(**params, **{argument: made})

        for option in reversed(options):
            run = option(run)
        return run

    return decorate


def _request(
    age: float | None, by: float | None, source_age: float | None, strength: float, faces: Literal["all", "largest"]
) -> AgeRequest:
    if (age is None) == (by is None):
        raise click.UsageError("give either --age N or --by +N")
    return AgeRequest(age=age, by=by, source_age=source_age, strength=strength, faces=faces)


source_age_option = click.option(
    "--source-age", type=AGE, metavar="YEARS", help="Everybody's present age. Default: estimated for each person."
)
strength_option = click.option(
    "--strength", type=click.FloatRange(0, 1), default=AgeRequest.strength, show_default=True,
    help="Share of the change that is applied.",
)  # fmt: skip
REQUEST_OPTIONS = (
    click.option("--age", type=AGE, metavar="YEARS", help="The age that everybody gets."),
    click.option("--by", type=float, metavar="YEARS", help="Years to add to each person's age: +20, -10."),
    source_age_option,
    strength_option,
    click.option(
        "--faces", type=click.Choice(["all", "largest"]), default=AgeRequest.faces, show_default=True,
        help="largest: the largest face of a photo, or the most prominent person of each shot.",
    ),
)  # fmt: skip
request_options = group("request", _request, *REQUEST_OPTIONS)


def check_model(name: str) -> None:
    """Raise click.BadParameter if there is no such model."""
    if name not in list_models():
        raise click.BadParameter(
            f'unknown model "{name}"; there are {", ".join(list_models())}; add one with `faceage models import`',
            param_hint="--model",
        )


@dataclass(frozen=True, kw_only=True)
class NetworkOptions:
    """Which networks are used, and what runs them."""

    model: str
    backend: BackendName | Literal["auto"]
    device: str
    precision: Precision | Literal["auto"]
    identity: Literal["compact", "facenet"]
    composite: Composite
    hair: Literal["on", "off"]
    min_face: float | None

    def __post_init__(self) -> None:
        check_model(self.model)
        DetectConfig(min_face_px=self.min_face)
        takes_several = any(parameter.name == "jobs" for parameter in click.get_current_context().command.params)
        if len(self.devices) > 1 and not takes_several:
            raise click.UsageError(
                f"--device {self.device}: only `faceage video` and `faceage images` use several GPUs"
            )

    @property
    def devices(self) -> list[str]:
        """What --device names: "cuda:0,1" is two."""
        kind, _, numbers = self.device.partition(":")
        return [f"{kind}:{number}" for number in numbers.split(",")] if "," in numbers else [self.device]

    def loader(self, device: str | None = None) -> functools.partial[Networks]:
        """Return what loads the networks on a device, by default the first; another process can be given it too."""
        return functools.partial(
            load_networks,
            model=self.model,
            identity=self.identity,
            runtime=choose_runtime(backend=self.backend, device=device or self.devices[0], precision=self.precision),
            detect=DetectConfig(min_face_px=self.min_face),
            composite=self.composite,
            hair=self.hair == "on",
        )

    def load(self, out: Output, *, in_background: bool = False) -> Networks:
        """Load the networks, saying what is built; `in_background` as in `load_networks`."""
        loader = self.loader()
        networks = loader(on_build=out.building, in_background=in_background)
        runtime: Runtime = loader.keywords["runtime"]
        out.detail(f"model {self.model}, backend {runtime.backend.name} on {runtime.device} in {runtime.precision}")
        out.result("engines", {"model": self.model, **runtime.describe()})
        return networks


model_option = click.option("--model", default=DEFAULT_MODEL, show_default=True, help="See `faceage models list`.")
backend_option = click.option(
    "--backend", type=click.Choice(["auto", *BACKENDS]), default="auto", show_default=True,
    help="What runs the networks. auto: openvino on the CPU; on a GPU the first of tensorrt, aotinductor and torch.",
)  # fmt: skip
network_options = group(
    "network",
    NetworkOptions,
    model_option,
    backend_option,
    click.option(
        "--device", default="auto", show_default=True, metavar="auto|cpu|cuda[:N,...]",
        help="Where they run. Several GPUs share the segments of a video, or photos.",
    ),
    click.option(
        "--precision", type=click.Choice(["auto", *get_args(Precision)]), default="auto", show_default=True,
        help="auto: bf16 on a CPU that has it, else fp32; fp16 on a GPU.",
    ),
    click.option(
        "--identity", type=click.Choice(["compact", "facenet"]), default="compact", show_default=True,
        help="The network that keeps people recognisable; facenet is fetched by `faceage models fetch facenet`.",
    ),
    click.option(
        "--composite", type=click.Choice(["delta", "replace"]), default="delta", show_default=True,
        help="delta adds the change to the face; replace pastes the generated face (Age-cGAN only).",
    ),
    click.option(
        "--hair", type=click.Choice(["on", "off"]), default="on", show_default=True,
        help="Whether hair turns grey (the space model only).",
    ),
    click.option("--min-face", type=float, metavar="PX", help="Smallest face, in pixels. Default: by picture size."),
)  # fmt: skip


def _output(as_json: bool, report: Path | None, verbose: bool, quiet: bool) -> Output:
    context = click.get_current_context()
    if verbose and quiet:
        raise click.UsageError("give either -v or -q")
    options = {name: value for name, value in context.params.items() if value is not None}
    return Output(context.info_name or "", options, as_json=as_json, report=report, verbosity=int(verbose) - int(quiet))


output_options = group(
    "out",
    _output,
    click.option(
        "--json", "as_json", is_flag=True, help="Print JSON events, one a line, on stdout and nothing else there."
    ),
    click.option(
        "--report",
        type=click.Path(dir_okay=False, path_type=Path),
        metavar="FILE.json|.html",
        help="Write a report: JSON, or also a page with each face before and after.",
    ),
    click.option("-v", "--verbose", is_flag=True, help="Say what is used and how long each stage takes."),
    click.option("-q", "--quiet", is_flag=True, help="Say nothing but errors."),
)
overwrite_option = click.option("--overwrite", is_flag=True, help="Replace outputs that exist.")
no_label_option = click.option("--no-label", is_flag=True, help="Do not mark outputs as partly synthetic.")


@dataclass(frozen=True, kw_only=True)
class WorkerOptions:
    """How many do the work, and where."""

    jobs: int
    ray: str | None

    def __post_init__(self) -> None:
        if self.jobs > 1 and self.ray is not None:
            raise click.UsageError("give either --jobs or --ray: a Ray cluster says itself how many work at a time")

    @contextmanager
    def start(self, network: NetworkOptions, networks: Networks) -> Iterator[Workers]:
        """Give the workers; they end with the block.

        Args:
            network: what they load.
            networks: the ones that are loaded here.
        """
        loader = network.loader()
        devices = network.devices
        if self.ray is not None:
            if len(devices) > 1:
                raise click.UsageError("a Ray cluster gives each worker a GPU of its own; give --device cuda")
            on_gpu = loader.keywords["runtime"].device.startswith("cuda")
            with Cluster(loader, self.ray, gpus=int(on_gpu)) as cluster:
                yield cluster
        elif self.jobs > 1 or len(devices) > 1:
            loaders = [network.loader(device) for device in devices]
            with Processes(loaders, max(self.jobs, len(devices))) as processes:
                yield processes
        else:
            yield Here(networks)


worker_options = group(
    "work_on",
    WorkerOptions,
    click.option(
        "--jobs", type=click.IntRange(min=1), default=1, show_default=True, metavar="N",
        help="Render in N processes of this machine, at least one a GPU.",
    ),
    click.option(
        "--ray", metavar="ADDRESS|local", help="Render on a Ray cluster whose machines all see the same files.",
    ),
)  # fmt: skip
