"""The recipes as Lightning callbacks: each measures, asks its rule in ``core``, acts and tells."""
