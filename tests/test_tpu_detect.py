"""The slice of a TPU host: from variables, from the metadata server of the VM, and never from anywhere else."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from hydra_plugins.memfit.base.errors import HardwareNotDetected
from hydra_plugins.memfit.base.units import GIB
from hydra_plugins.memfit.hardware import tpu
from hydra_plugins.memfit.hardware.resolve import resolve

TPU_ENV_V4 = """\
ACCELERATOR_TYPE: 'v4-16'
CHIPS_PER_HOST_BOUNDS: '2,2,1'
HOST_BOUNDS: '1,1,2'
WORKER_ID: '0'
ZONE: 'us-central2-b'
"""


class Asked:
    """What the stand-in metadata server was asked for."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.host = ""


@contextmanager
def metadata(answers: dict[str, str], *, google: bool = True, status: int = 200, delay_s: float = 0) -> Iterator[Asked]:
    """Serve attributes of a VM on a local port, as the metadata server does."""
    asked, hang = Asked(), threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.paths.append(self.path)
            assert self.headers["Metadata-Flavor"] == "Google"
            hang.wait(delay_s)
            name = self.path.rpartition("/")[2]
            self.send_response(status if name in answers else 404)
            if google:
                self.send_header("Metadata-Flavor", "Google")
            self.end_headers()
            if name in answers:
                self.wfile.write(answers[name].encode())

        def log_message(self, *_: object) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    asked.host = f"127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield asked
    finally:
        hang.set()
        server.shutdown()
        server.server_close()


@pytest.fixture
def tpu_root(tmp_path: Path) -> Path:
    """A root directory with the device files of a v4 host."""
    (tmp_path / "dev").mkdir()
    for i in range(4):
        (tmp_path / f"dev/accel{i}").touch()
    return tmp_path


@pytest.mark.parametrize(
    ("environ", "name", "per_host", "hosts", "gib"),
    [
        ({"TPU_ACCELERATOR_TYPE": "v4-16"}, "v4-16", 4, 2, 30.75),
        ({"TPU_ACCELERATOR_TYPE": "v4-8"}, "v4-8", 4, 1, 30.75),
        ({"TPU_ACCELERATOR_TYPE": "v4-32"}, "v4-32", 4, 4, 30.75),
        ({"TPU_ACCELERATOR_TYPE": "v5litepod-8"}, "v5e-8", 8, 1, 15.75),
        ({"TPU_ACCELERATOR_TYPE": "v6e-8"}, "v6e-8", 8, 1, 31.25),
        ({"TPU_ACCELERATOR_TYPE": "v6e-16"}, "v6e-16", 4, 4, 31.25),
        ({"TPU_ACCELERATOR_TYPE": "v6e-1"}, "v6e-1", 1, 1, 31.25),
        (
            {"TPU_ACCELERATOR_TYPE": "v6e-8", "TPU_CHIPS_PER_HOST_BOUNDS": "2,2,1", "TPU_HOST_BOUNDS": "1,2,1"},
            "v6e-8", 4, 2, 31.25,
        ),
        ({"TPU_ACCELERATOR_TYPE": "v4-16", "TPU_WORKER_HOSTNAMES": "10.0.0.2,10.0.0.3"}, "v4-16", 4, 2, 30.75),
    ],
)  # fmt: skip
def test_variables_name_the_slice(
    environ: dict[str, str], name: str, per_host: int, hosts: int, gib: float, tmp_path: Path
) -> None:
    """The accelerator type gives generation and chips; bounds and host names win over the usual shape of a host."""
    found = tpu.detect(environ, root=tmp_path)
    assert found is not None
    assert (found.name, found.kind, found.gpus_per_node, found.nodes) == (name, "tpu", per_host, hosts)
    assert found.capacity_bytes == int(gib * GIB)
    assert "TPU_ACCELERATOR_TYPE" in found.source


def test_metadata_server_names_the_slice(tpu_root: Path) -> None:
    """On a TPU VM without variables the attribute tpu-env answers, with its bounds."""
    with metadata({"tpu-env": TPU_ENV_V4}) as asked:
        found = tpu.detect({"GCE_METADATA_HOST": asked.host}, root=tpu_root)
    assert found is not None
    assert (found.name, found.gpus_per_node, found.nodes) == ("v4-16", 4, 2)
    assert asked.paths == ["/computeMetadata/v1/instance/attributes/tpu-env"]
    assert "metadata server" in found.source


def test_older_vm_answers_accelerator_type(tpu_root: Path) -> None:
    """A VM without tpu-env is asked for accelerator-type."""
    with metadata({"accelerator-type": "v4-8\n"}) as asked:
        found = tpu.detect({"GCE_METADATA_HOST": asked.host}, root=tpu_root)
    assert found is not None
    assert found.name == "v4-8"


def test_host_without_tpu_is_never_asked(tmp_path: Path) -> None:
    """Without a device file, a variable or Google's accelerator on the bus nothing is sent over the network."""
    network_card = tmp_path / "sys/bus/pci/devices/0000:00:05.0"
    network_card.mkdir(parents=True)
    (network_card / "vendor").write_text("0x1ae0\n")
    (network_card / "device").write_text("0x0042\n")
    with metadata({"tpu-env": TPU_ENV_V4}) as asked:
        assert tpu.detect({"GCE_METADATA_HOST": asked.host}, root=tmp_path) is None
    assert asked.paths == []


def test_accelerator_on_the_bus_is_a_tpu_host(tmp_path: Path) -> None:
    """v5e and v6e hosts have no /dev/accel files; the PCI bus shows the chip."""
    chip = tmp_path / "sys/bus/pci/devices/0000:00:04.0"
    chip.mkdir(parents=True)
    (chip / "vendor").write_text("0x1ae0\n")
    (chip / "device").write_text("0x0063\n")
    assert tpu.is_tpu_host({}, tmp_path)


@pytest.mark.parametrize(
    ("answers", "options", "why"),
    [
        ({}, {}, "no attribute"),
        ({"tpu-env": TPU_ENV_V4}, {"google": False}, "a captive portal, not the metadata server"),
        ({"tpu-env": TPU_ENV_V4}, {"status": 500}, "a broken server"),
        ({"tpu-env": TPU_ENV_V4}, {"delay_s": 5.0}, "a server that hangs"),
        ({"tpu-env": "garbage"}, {}, "an attribute without a type"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_no_answer_is_an_error_with_the_fix(
    answers: dict[str, str], options: dict[str, object], why: str, tpu_root: Path
) -> None:
    """A TPU host whose slice nobody names is an error that says how to name it, and within the timeout."""
    with metadata(answers, **options) as asked, pytest.raises(HardwareNotDetected) as caught:  # type: ignore[arg-type]
        tpu.detect({"GCE_METADATA_HOST": asked.host}, root=tpu_root, timeout_s=0.2)
    assert "+hardware=v4-16" in str(caught.value), why


@pytest.mark.parametrize("kind", ["v2-8", "v3-32", "v9-8", "tpu", "v4"])
def test_unknown_generation_is_refused(kind: str, tmp_path: Path) -> None:
    """A generation without facts is an error that lists the known ones; nothing is guessed."""
    with pytest.raises(HardwareNotDetected, match="v4, v5p, v5e, v6e"):
        tpu.detect({"TPU_ACCELERATOR_TYPE": kind}, root=tmp_path)


def test_visible_chips_shrink_the_host(tmp_path: Path) -> None:
    """TPU_VISIBLE_CHIPS leaves a process part of its host, and the reading says so."""
    found = tpu.detect({"TPU_ACCELERATOR_TYPE": "v6e-8", "TPU_VISIBLE_CHIPS": "0,1"}, root=tmp_path)
    assert found is not None
    assert (found.gpus_per_node, found.nodes) == (2, 1)
    assert any("2 of this host's 8" in warning for warning in found.warnings)


@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="a GPU answers first here")
def test_auto_finds_the_slice() -> None:
    """hardware=auto on a host without a GPU takes the slice that its variables name."""
    found = resolve("auto", environ={"TPU_ACCELERATOR_TYPE": "v4-16", "TPU_WORKER_ID": "1"})
    assert (found.name, found.gpus_per_node, found.nodes) == ("v4-16", 4, 2)
