"""``flexlora doctor``, and what client init and server init share: keys, certificates, folders."""
