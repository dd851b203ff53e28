"""`lorax serve`: the OpenAI protocol over one model with many adapters.

limits.py      what a client may ask for, and how long for
queue.py       who waits, and whose turn it is: fair between adapters
engine.py      the thread that owns the model: requests join and leave between tokens
answer.py      one answer under way: tokens to text, stop words, log probabilities
adapters.py    model names and the directory of adapters
protocol.py    requests as OpenAI has them, checked
replies.py     answers and errors as OpenAI has them
app.py         the routes
metrics.py     what Prometheus reads
run.py         socket, signals, and clients that stop reading
"""
