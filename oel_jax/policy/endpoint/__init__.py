"""The deployed policy behind a server that speaks OpenAI's chat completions: `endpoint` is the face
(many requests at once, retries), `completions` what a request and a response hold, `connection` one
HTTP request with a deadline.
"""
