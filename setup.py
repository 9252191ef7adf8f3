"""Maps each top-level folder F to the package cutnmix.F, so that nothing generic lands in site-packages."""

from setuptools import setup

FOLDERS = ("pipeline", "trainer", "models", "benchmarks", "configs")
PACKAGES = {f"cutnmix.{folder}": folder for folder in FOLDERS} | {
    "cutnmix.trainer.methods": "trainer/methods",
    "cutnmix.benchmarks.reproduce": "benchmarks/reproduce",
}

setup(
    packages=list(PACKAGES),
    package_dir=PACKAGES,
    package_data={
        "cutnmix.configs": ["*.yaml", "*/*.yaml", "grids/ablation/*.yaml"],
        "cutnmix.benchmarks.reproduce": ["*.css", "*.js"],
    },
)
