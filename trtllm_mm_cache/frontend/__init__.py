"""The frontend: the OpenAI API over HTTP, from a client's request to a PD worker's and back.

The way of a request, a file each:

    server      routes, and the bounds on connections
    endpoint    one request over HTTP, from its arrival to its answer or its error
    body        received within a bound on memory, data: URLs taken out before the JSON is read
    request     every field is served, or refused by its name (`refusals`)
    prompt      the model's own template and tokenizer
    call        what a PD worker is asked; `runtime/pd_client` chooses which
    answer      its tokens to text (`text`), and text to the API's objects
    responses   what the client is sent
"""
