"""`python -m kdcache_cli`: the `kdcache` command where its script is not on the path."""

from kdcache_cli.main import main

if __name__ == "__main__":
    main(prog_name="kdcache")
