"""`trtllm-mm-cache serve`: a frontend, encode workers and PD workers on this machine, as one thing.

`plan` decides what runs and checks what can be checked before anything does; `folder` is where a run keeps
its files; `stack` starts, watches and ends the processes. Each is in the place of a `service`, and ends with
this one (`child`), however this one ends (`attached`). Workers are forked from a process that has imported
the engine already (`warm`), so that one that was lost serves again in a second.

Imports no engine, no torch and no Dynamo: a mistake is said at once.
"""
