"""What a killed dump would spend its time importing."""

import kdcache.dump
import kdcache.stream.reader
import kdcache.teachers.native
import kdcache.train
import kdcache_cli.dump
import kdcache_cli.main

__all__ = ["kdcache", "kdcache_cli"]
