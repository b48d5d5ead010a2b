"""The page of `atom pin --report`: the sources of a data recipe, before anything is paid for."""
