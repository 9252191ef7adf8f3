"""Options that several commands share."""

from typing import Annotated

import typer

from cutnmix.models import check_name
from cutnmix.trainer.keys import ConfigError


def _known(name: str) -> str:
    try:
        check_name(name)
    except ValueError as error:
        raise ConfigError(f"--network: {str(error).removeprefix('peers.network: ')}") from error
    return name


Network = Annotated[str, typer.Option(help="of all peers, as in cutnmix models", callback=_known)]
