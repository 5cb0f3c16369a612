"""The embedded policy: its procedural worlds, corpus, vocabulary, pre-training, probes and shipped
weights.
"""
