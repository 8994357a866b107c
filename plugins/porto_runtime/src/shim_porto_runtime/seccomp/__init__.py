"""Seccomp: OCI profiles, the default one among them, compiled to the filter that portoshim-init loads.

Porto has a property for profiles, but loading one by it sets no_new_privs, which a pod may not want: setuid programs
would stop working. So init loads the filter itself, as the last thing it does; nothing but ``execve`` has to be
allowed for it.
"""

from shim_porto_runtime.seccomp.bpf import compile_profile
from shim_porto_runtime.seccomp.default import default_profile
from shim_porto_runtime.seccomp.profile import Profile, parse

__all__ = ["Profile", "compile_profile", "default_profile", "parse"]
