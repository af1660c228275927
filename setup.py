"Package metadata: everything is read from settings.ini"
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_namespace_packages, setup

config = ConfigParser(delimiters=["="])
config.read(Path(__file__).parent / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]
extras = {k.removesuffix("_requirements"): v.split() for k, v in cfg.items() if k.endswith("_requirements")}

setup(
    name=cfg["lib_name"], version=cfg["version"], description=cfg["description"], keywords=cfg["keywords"],
    author=cfg["author"], author_email=cfg["author_email"], license="Apache-2.0", url=cfg["git_url"],
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    packages=find_namespace_packages(include=["diffuspeech", "diffuspeech.*"]), include_package_data=True,
    python_requires=f">={cfg['min_python']},<3.13",
    install_requires=cfg["requirements"].split(), extras_require=extras,
    entry_points={
        "console_scripts": cfg["console_scripts"].split(), "nbdev": ["diffuspeech=diffuspeech._modidx:d"]
    },
)
