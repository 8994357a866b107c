"""The hooks: what a plugin may answer, and what each answer means.

A plugin is a class; the functions it answers are marked with :data:`hookimpl` and named as the hooks are. It may take
fewer arguments than the hook has. Where a hook has one answer, plugins are asked in order and the first that returns
something other than None has answered; None means "not mine".
"""

import pluggy

hookspec = pluggy.HookspecMarker("shim")
hookimpl = pluggy.HookimplMarker("shim")
