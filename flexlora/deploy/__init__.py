"""What ``flexlora client init`` and ``flexlora server init`` share: keys, certificates, folders."""
