"""The page's plots as images, drawn by the Chrome or Chromium that is there."""

import copy
from collections.abc import Mapping
from pathlib import Path

from pipeline.errors import UserError
from pipeline.files import aside_of, atomic_directory
from pipeline.web.panels import FONT, Figure

WIDTH, SCALE = 1200, 1.5
"""Pixels of the layout, and of the image for each of them."""


def write(figures: Mapping[str, Figure], folder: Path) -> list[Path]:
    """A PNG for each figure, in the place of the folder as it was. -> the files

    Raises UserError where kaleido or a browser is missing, or the browser does not do its work.
    """
    several = "detail1" in figures  # what is picked on the page would be one image of each run
    shown = {name: figure for name, figure in figures.items() if not (several and name.startswith("detail"))}
    with atomic_directory(folder) as aside:
        _draw({aside / f"{name}.png": figure for name, figure in shown.items()})
    return [folder / f"{name}.png" for name in shown]


def write_one(figure: Figure, file: Path) -> None:
    """One PNG, whole or not at all. Raises UserError as `write`."""
    aside = aside_of(file).with_suffix(".png")
    _draw({aside: figure})
    aside.replace(file)


def _draw(figures: Mapping[Path, Figure]) -> None:
    try:
        import kaleido
        from kaleido.errors import BrowserClosedError, BrowserFailedError, ChromeNotFoundError, KaleidoError
    except ModuleNotFoundError as error:
        raise UserError("images need kaleido; pip install 'clt-pipeline[report]', or leave --png out") from error
    try:
        specs = [_spec(figure, file) for file, figure in figures.items()]
        # Mathematics would be typeset by a script from the network.
        kaleido.write_fig_from_object_sync(specs, kopts={"mathjax": False})
    except ChromeNotFoundError as error:
        raise UserError(
            "images need Chrome or Chromium; install one (apt-get install chromium) or name it in BROWSER_PATH, or "
            "leave --png out: each plot of the page has a camera button"
        ) from error
    except (BrowserClosedError, BrowserFailedError, KaleidoError, TimeoutError) as error:
        raise UserError(f"the browser drew no images ({error}); run again, or leave --png out") from error


def _spec(figure: Figure, file: Path) -> dict[str, object]:
    drawn = copy.deepcopy(figure)
    drawn["layout"] |= {"paper_bgcolor": "white", "plot_bgcolor": "white", "font": {"family": FONT, "size": 12}}
    for key in drawn["layout"]:
        if key.startswith(("xaxis", "yaxis")):
            drawn["layout"][key]["gridcolor"] = "#e8ebee"
    size = {"width": WIDTH, "height": figure["layout"]["height"], "scale": SCALE}
    return {"fig": drawn, "path": file, "opts": {"format": "png", **size}}
