"""The OpenAI-compatible server. The life of a request is drawn in docs/map.md.

HTTP process                                   engine process
app (guards, auth, admission) -> schema ->     worker: drain messages -> Engine.step -> outputs
text (template, tokens) -> client  ==msgpack== of every step, together
<- stream or whole answer
"""
