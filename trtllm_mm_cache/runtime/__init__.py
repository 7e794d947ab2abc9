"""Dynamo's runtime: the only place that imports `dynamo`.

`connect` joins a deployment, `presence` keeps a worker in discovery, `messages` is what workers say to each
other, `streaming` how an answer outlives its handler, `faults` how an error reaches Dynamo's frontend,
`control` and `control_client` what operators ask of workers.
"""
