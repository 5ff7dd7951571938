"""What `patches.megatron_core` is made of: one file for each kind of layer, and what they share.

A file for a kind of layer is listed in `megatron_core.LAYERS` and offers

    takes(module)     whether it compresses what this built module sends
    messages(module, site, config)  the sites of what it sends; left out where that is one message at the module's site.
                      Raises ModelError for a selected site whose message is out of reach
    wrappers()        [(class, attribute, wrapper)]: for as long as anything is enabled, `attribute` of `class` is
                      wrapper(original), which calls the original where `hooks.config_of(self)` is None
"""
