"""The NVIDIA driver and torch's build, read without importing torch."""

from __future__ import annotations

import contextlib
import importlib.util
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tunesmith.hardware import ask_nvml, driver_version, nvml, nvml_devices

Version = tuple[int, int]
_PCI = Path("/sys/bus/pci/devices")
_PROC = Path("/proc/driver/nvidia/version")
_NVIDIA_VENDOR = "0x10de"
_DISPLAY_CLASS = "0x03"


@dataclass(frozen=True)
class Driver:
    """What is known of GPUs and driver before torch is imported. `problem` with `mend`: present, but unusable."""

    version: str | None = None
    cuda: Version | None = None
    gpus: tuple[str, ...] = ()
    problem: str | None = None
    mend: str | None = None

    @property
    def has_gpu(self) -> bool:
        """Whether a GPU is there for use."""
        return self.problem is None and bool(self.gpus)


@dataclass(frozen=True)
class TorchBuild:
    """Torch as its files describe it; `cuda` is None for a build without."""

    version: str
    cuda: Version | None


def find_driver() -> Driver:
    """The driver by NVML, else by nvidia-smi; a GPU that is there without either is a problem with its mend."""
    return _by_nvml() or _by_nvidia_smi() or _without_tools()


def _by_nvml() -> Driver | None:
    module = nvml()
    if module is None:
        return None
    number = int(module.nvmlSystemGetCudaDriverVersion())
    names = tuple(str(ask_nvml("nvmlDeviceGetName", handle)) for handle in nvml_devices())
    return Driver(driver_version(), (number // 1000, number % 1000 // 10), names)


def _by_nvidia_smi() -> Driver | None:
    if shutil.which("nvidia-smi") is None:
        return None
    try:
        done = subprocess.run(["nvidia-smi"], capture_output=True, text=True, timeout=60)
        names = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Driver(problem=f"nvidia-smi does not answer: {error}", mend="sudo reboot")
    if done.returncode:
        said = (done.stdout + done.stderr).strip().splitlines() or ["nothing"]
        return Driver(
            problem=f"nvidia-smi fails: {said[0]}", mend="sudo reboot   (after a driver update), else reinstall it"
        )
    return parse_nvidia_smi(done.stdout, names.stdout)


def parse_nvidia_smi(header: str, listing: str) -> Driver:
    """The driver from what `nvidia-smi` and `nvidia-smi -L` print."""
    version = re.search(r"Driver Version:\s*([\d.]+)", header)
    cuda = re.search(r"CUDA Version:\s*(\d+)\.(\d+)", header)
    gpus = re.findall(r"^GPU \d+: (.+?) \(UUID", listing, flags=re.MULTILINE)
    return Driver(
        version=version[1] if version else None,
        cuda=(int(cuda[1]), int(cuda[2])) if cuda else None,
        gpus=tuple(gpus),
    )


def _without_tools() -> Driver:
    if _PROC.exists():
        if not any(Path("/dev").glob("nvidia[0-9]*")):
            return Driver(
                version=driver_version(),
                problem="the driver is loaded, and no GPU is handed to this container",
                mend="docker run --gpus all ...",
            )
        return Driver(version=driver_version(), gpus=("NVIDIA GPU",))
    if _gpu_on_the_bus():
        return Driver(
            problem="there is an NVIDIA GPU, and no driver",
            mend="sudo apt-get install -y nvidia-driver   (Ubuntu: sudo ubuntu-drivers install), then reboot",
        )
    return Driver()


def _gpu_on_the_bus() -> bool:
    for device in _PCI.glob("*") if _PCI.is_dir() else ():
        with contextlib.suppress(OSError):
            vendor = (device / "vendor").read_text(encoding="ascii").strip()
            kind = (device / "class").read_text(encoding="ascii").strip()
            if vendor == _NVIDIA_VENDOR and kind.startswith(_DISPLAY_CLASS):
                return True
    return False


def read_torch_build() -> TorchBuild | None:
    """Torch's version and CUDA from its version.py, without importing it; None when it is not installed."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    return parse_torch_version((Path(spec.origin).parent / "version.py").read_text(encoding="utf-8"))


def parse_torch_version(text: str) -> TorchBuild:
    """The build that torch/version.py describes."""
    version = re.search(r"^__version__\s*=\s*['\"]([^'\"]+)", text, flags=re.MULTILINE)
    cuda = re.search(r"^cuda\b[^=]*=\s*['\"](\d+)\.(\d+)", text, flags=re.MULTILINE)
    return TorchBuild(version[1] if version else "unknown", (int(cuda[1]), int(cuda[2])) if cuda else None)
