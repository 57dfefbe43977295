"""A small crew of agents, run with and without the governor.

A model server on loopback streams tokens over HTTP; agents in threads read its
streams and run the bursts of tools that it asks for. The same plan of turns is
followed twice, for the same time: first under one governor, then without one.
How much goes on at once is counted where it goes on, apart from the governor::

    agent --- HTTP ---> ModelServer   counts the open streams
      |
      +--- pool ------> Toolbox       counts the running tools

The library needs nothing of this, and this nothing but the library's front door.
"""
