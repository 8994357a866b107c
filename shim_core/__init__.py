"""The core of portoshim: a CRI server that turns every call into a hook and leaves the answer to plugins.

What a plugin needs::

    from shim_core import hookimpl, errors
    from shim_core.config import Section
    from shim_core.context import CallContext
    from shim_core.cri.v1 import api_pb2
    from shim_core.types import NetworkAttachment, RegistryCredentials
"""

from shim_core.hookspecs import hookimpl

__all__ = ["__version__", "hookimpl"]

__version__ = "0.1.0"
