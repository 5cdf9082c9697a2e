"""How a server answers under load: requests as they would arrive, latencies as their senders would see them.

workload.py     what is sent: synthetic lengths, ShareGPT prompts, the Azure trace, GSM8K questions
arrivals.py     when it is sent: Poisson, as many as are in flight, or as a trace says
client.py       the HTTP client, one request a task; sse.py reads its stream
record.py       what one request saw
measures.py     what a point's records say: percentiles, rates, goodput, and whether the client itself was the limit
load.py         one point in one process; shards.py spreads it over several
target.py       the server: one that is there, or one started for the run
run.py          all points, and their run directory
"""
