"""Knowledge → weights, on the server side: losses, batches, teacher, step, training. Imports no
environment.
"""
