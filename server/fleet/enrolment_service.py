"""``flexlora fleet serve``: the endpoint behind the proxy by which nodes enrol.

It listens on loopback alone, and the proxy passes ``/flexlora/enroll`` (POST) and
``/flexlora/ca.crt`` (GET) on to it. Requests are decided one at a time. Every few seconds it also
finishes rotations whose time has come.
"""

from __future__ import annotations

import json
import logging
import threading
from pathlib import Path
from typing import Annotated

from fastapi import FastAPI, Request, Response
from starlette.concurrency import run_in_threadpool
from typer import Option

from flexlora.commands.options import PATH
from flexlora.deploy.certificates import printable
from flexlora.deploy.hosts import parse_port
from flexlora.deploy.invitation import AUTHORITY_PATH, ENROLL_PATH, REFUSED
from flexlora.errors import UserError, one_line
from flexlora.server.fleet import enrolment
from flexlora.server.fleet.operations import open_fleet, table_path

__all__ = ["enrolment_app", "fleet_serve"]

LOG = logging.getLogger("flexlora.enrolment")
LARGEST = 8192  # bytes of a request; the proxy has the same bound
SETTLE_SECONDS = 60.0


def enrolment_app(folder: Path) -> FastAPI:
    """The endpoint of one server folder."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    one_at_a_time = threading.Lock()

    def decide(body: bytes, address: str) -> tuple[int, dict[str, str]]:
        try:
            with one_at_a_time:
                request = enrolment.Request.of(_parsed(body))
                given = enrolment.answer(folder, request, address)
        except UserError as error:
            LOG.warning("%s: %s", address, printable(one_line(error)))
            return 503, {"state": "", "sentence": one_line(error)}
        refused = given.state == REFUSED
        level = logging.INFO if given.is_new else logging.DEBUG
        LOG.log(
            logging.WARNING if refused else level,
            "%s: %s: %s%s",
            address,
            printable(given.name),
            "refused: " if refused else "",
            given.sentence,
        )
        authority = (folder / "ca.crt").read_text(encoding="ascii")
        answer = {"state": given.state, "sentence": given.sentence, "name": given.name}
        return (403, answer) if refused else (200, answer | {"ca.crt": authority})

    @app.post(ENROLL_PATH)
    async def enroll(request: Request) -> Response:
        address = printable(request.headers.get("x-real-ip", "")[:64])
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > LARGEST:
                return Response(status_code=413)
        status, answer = await run_in_threadpool(decide, body, address)
        return Response(json.dumps(answer), status_code=status, media_type="application/json")

    @app.get(AUTHORITY_PATH)
    def authority() -> Response:
        return Response((folder / "ca.crt").read_bytes(), media_type="application/x-pem-file")

    return app


def fleet_serve(
    port: Annotated[int, Option(help="on loopback, for the proxy")],
    server: Annotated[
        str, Option(metavar="DIR", click_type=PATH, help="the server's folder (default: this one)")
    ] = ".",
) -> None:
    """Answer nodes that enrol, until it is stopped.

    Raises:
        UserError: no server folder, or a port that is taken.
    """
    import uvicorn

    folder = Path(server).resolve()
    table_path(folder)
    parse_port(port, "--port")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    stopped = threading.Event()
    ticking = threading.Thread(target=_settle, args=(folder, stopped), daemon=True)
    ticking.start()
    config = uvicorn.Config(
        enrolment_app(folder), host="127.0.0.1", port=port, access_log=False, server_header=False
    )
    try:
        uvicorn.Server(config).run()
    finally:
        stopped.set()


def _settle(folder: Path, stopped: threading.Event) -> None:
    """Finish rotations; an operator at work or a SuperLink that is down puts it off."""
    while not stopped.wait(SETTLE_SECONDS):
        try:
            with open_fleet(folder) as fleet:
                for done in fleet.settled:
                    LOG.info("%s", done)
        except UserError as error:
            LOG.info("rotations were not looked at: %s", one_line(error))


def _parsed(body: bytes) -> object:
    try:
        return json.loads(body)
    except ValueError:
        raise UserError("this is no enrolment request: no JSON.") from None
