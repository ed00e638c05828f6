"""`python -m loraplex_server --config server.toml`, the same as `loraplex serve`."""

import sys

from loraplex_server.app import main

if __name__ == "__main__":
    sys.exit(main())
