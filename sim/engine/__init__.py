"""The engine of the simulator: a ClientApp as many virtual nodes, here or in Ray actors.

``questions`` is what is handed around, ``runner`` answers it with a ClientApp, ``pool`` shares it
out among Ray actors (``worker`` is what runs in one, ``parcels`` how records get there, ``cluster``
where they live), ``states`` keeps what nodes keep.
"""
