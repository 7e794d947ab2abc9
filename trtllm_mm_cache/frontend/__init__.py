"""The frontend: the OpenAI API over HTTP, from a client's request to a PD worker's and back.

A request's way: `server` (routes) → `body` (bounded in memory, data: URLs taken out before the JSON is read) →
`request` (every field served or refused by its name) → `prompt` (the model's template and tokenizer) → `call`
(what a PD worker is asked) → `runtime/pd_client` (which one) → `answer` (tokens to text and chunks).
"""
