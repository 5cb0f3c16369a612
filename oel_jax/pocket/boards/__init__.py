"""The second embedded policy's two games: push worlds that look like TextArena's Sokoban beside
Frozen Lakes, on boards of which half are held out.
"""
