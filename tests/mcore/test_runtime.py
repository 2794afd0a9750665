"""What a process sets up for itself before it joins the others."""

from __future__ import annotations

import resource

from lens_megatron.mcore.runtime import _SOCKETS, _allow_many_sockets


def test_as_many_sockets_as_the_system_allows() -> None:
    before, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, most))
        _allow_many_sockets()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (min(most, _SOCKETS), most)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (before, most))
