"""What `patches.megatron_core` is made of: one file for each kind of layer, and what they share.

A file for a kind of layer is listed in `megatron_core.LAYERS` and offers

    takes(module)     whether it compresses what this built module sends
    wrappers()        [(class, attribute, wrapper)]: for as long as anything is enabled, `attribute` of `class` is
                      wrapper(original), which calls the original where `hooks.config_of(self)` is None

and, if need be,

    messages(module, site, config)  the sites of what it sends, where that is not one message at the module's own site
    refusal(module)                 why this module's messages cannot be compressed although the class is known, or None
"""
