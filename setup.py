"""Package metadata. `kernels/` lies beside the package in the repository and installs as `immunity_fast.kernels`,
because a top-level package called `kernels` would collide with a well-known one."""

import re
from pathlib import Path

from setuptools import setup

# The lower bounds are what `make test-oldest` installs; constraints-oldest.txt holds the same versions, and a test
# compares the two. torch, triton and torchvision must not be raised beyond what rented GPUs come with: 2.11, 3.6, 0.26.
EXPORT = ["onnx>=1.17", "onnxscript>=0.6"]  # torch 2.11's exporter asks onnxscript for an interface that 0.6 brought
NOTEBOOK = ["ipykernel>=6.29", "nbclient>=0.10", "nbformat>=5.10"]  # what runs a notebook without a browser
HUB = ["huggingface_hub>=0.25", "safetensors>=0.4"]
STREAMING = ["datasets>=3.0", "torchdata>=0.11"]  # tables of Hugging Face's; loaders whose place can be saved
WANDB = ["wandb>=0.19"]
LOGGERS = ["mlflow-skinny>=3.1", *WANDB]
TRAIN = [
    "jinja2>=3.1",
    "matplotlib>=3.8",
    "numpy>=1.26",
    "pillow>=10",
    "pyyaml>=6.0.1",  # the first with a wheel for Python 3.12
    "rich>=13",
    "safetensors>=0.4",
    "scikit-learn>=1.3.1",  # the first with a wheel for Python 3.12
    "shtab>=1.10",  # completion of the console command
    "tensorboard>=2.15",
    "torchvision>=0.26",
]
TEST = [
    *TRAIN,
    *EXPORT,
    *HUB,
    *NOTEBOOK,
    "hypothesis>=6.100",
    "onnxruntime>=1.20",
    "pytest>=8",
    "pytest-benchmark>=5",
    "pytest-xdist>=3.0.2",
    "pytorch-lightning>=2.6",
    "torchattacks>=3.5,<3.6",  # what tests compare attacks with
    "torchdata>=0.11",
]
DOCS = [*TRAIN, "furo>=2024.8.6", "myst-parser>=4", "sphinx>=7.3"]
# Other people's networks, wrappers and attacks, which only tests and examples use, in the versions of constraints.txt;
# where one is missing its tests are skipped.
OTHERS = [
    "accelerate>=1.15",
    "adversarial-robustness-toolbox>=1.20",
    "captum>=0.9",
    "datasets>=3.0",
    *WANDB,  # not mlflow-skinny: its requests is newer than torchattacks allows; the Makefile installs it afterwards
    "foolbox>=3.3.4",
    "timm>=1.0.31",
    "transformers>=5.24",
    "webdataset>=1.0",
]
DEV = [*TEST, *DOCS, *OTHERS, "build>=1.2", "mypy>=1.10", "ruff>=0.6"]


def index_description(readme: str) -> str:
    """The README as a package index can show it: of links to files and of figures of the repository the text.

    An index does not know where the repository is. What looks like a link in code is none.
    """
    code = r"^```.*?^```|`[^`\n]+`"
    link = r"(?P<figure>!?)\[(?P<text>[^\]]*)\]\((?!https?:)[^)]*\)"

    def shown(match: re.Match[str]) -> str:
        if match["text"] is None:
            return match[0]
        return f"*Figure, in the repository: {match['text']}.*" if match["figure"] else match["text"]

    return re.sub(f"{code}|{link}", shown, readme, flags=re.DOTALL | re.MULTILINE)


setup(
    name="immunity-fast",
    version="0.1.0",
    description="Fast mixtures of experts for adversarial defence, with losses on the experts' Grad-CAM heatmaps",
    long_description=index_description(Path(__file__).with_name("README.md").read_text(encoding="utf-8")),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    packages=[
        "immunity_fast",
        "immunity_fast.attacks",
        "immunity_fast.data",
        "immunity_fast.deployment",
        "immunity_fast.evaluation",
        "immunity_fast.experts",
        "immunity_fast.kernels",
        "immunity_fast.models",
        "immunity_fast.peers",
        "immunity_fast.poisoning",
        "immunity_fast.reporting",
        "immunity_fast.reproduction",
        "immunity_fast.runtime",
        "immunity_fast.training",
    ],
    package_dir={"immunity_fast": "immunity_fast", "immunity_fast.kernels": "kernels"},
    package_data={
        "immunity_fast": ["py.typed"],
        "immunity_fast.reporting": ["report.html.jinja"],
        "immunity_fast.reproduction": ["gallery.html.jinja"],
        "immunity_fast.runtime": ["options.json", "strategies.json"],
    },
    entry_points={"console_scripts": ["immunity-fast = immunity_fast.__main__:main"]},
    install_requires=["torch>=2.11", "triton>=3.6; platform_system == 'Linux'"],
    extras_require={
        "train": TRAIN,
        "export": EXPORT,
        "hub": HUB,
        "streaming": STREAMING,
        "loggers": LOGGERS,
        "notebook": NOTEBOOK,
        "test": TEST,
        "docs": DOCS,
        "dev": DEV,
    },
)
