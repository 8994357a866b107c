"""A client inside a container: runs the calls named on its command line and prints what came of them, as JSON."""

from __future__ import annotations

import json
import sys


def main() -> None:
    socket, path, *calls = sys.argv[1:]
    sys.path[:0] = path.split(":")
    from porto_api import Client, errors

    porto = Client(socket)
    for call in calls:
        try:
            found = eval(call, {"porto": porto})  # noqa: S307  the tests' own words
        except errors.PortoError as err:
            found = f"{type(err).__name__}: {err.message}"
        print(json.dumps(found, default=str), flush=True)


if __name__ == "__main__":
    main()
