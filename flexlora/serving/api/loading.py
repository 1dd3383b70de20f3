"""Adapters loaded and dropped over HTTP, by vLLM's names, from one folder only.

A path that comes over the network is dangerous: it could name any file of this machine. So it works
only where the operator gave a folder, and only for what lies in it once links are resolved. The
answer is the same for what lies outside and for what is not there.
"""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import PlainTextResponse
from starlette.concurrency import run_in_threadpool

from flexlora.serving.api.bodies import LoadBody, UnloadBody
from flexlora.serving.api.errors import ApiError
from flexlora.serving.api.service import AdapterNames, Service

__all__ = ["MAX_LOADED", "Loading", "add_loading"]

MAX_LOADED = 256  # adapters in host memory that came over the network
FILES = ("adapter_config.json", "adapter_model.safetensors")


class Loading:
    """Adapters from below ``root``; what was given at the start stays.

    Raises:
        UserError: as ``AdapterStore.add``.
    """

    def __init__(self, adapters: AdapterNames, root: str | Path) -> None:
        self._adapters, self.root = adapters, Path(root).resolve()
        self._loaded: set[str] = set()

    def load(self, name: str, path: str, *, replace: bool) -> None:
        """Read the PEFT folder ``path``, absolute or below the root, and serve it as ``name``.

        Raises:
            ApiError: no PEFT folder below the root, too many loaded, a name that is in use.
        """
        folder = self._folder(path)
        if name in self._adapters.names() and not (replace and name in self._loaded):
            how = "load_inplace: true replaces it" if name in self._loaded else "it stays"
            raise ApiError(400, f"an adapter is named '{name}' already; {how}.", param="lora_name")
        if len(self._loaded | {name}) > MAX_LOADED:
            raise ApiError(400, f"{MAX_LOADED} adapters are loaded; unload one first.")
        self._adapters.add(name, folder, replace=replace)
        self._loaded.add(name)

    def unload(self, name: str) -> None:
        """Forget an adapter that was loaded; its answers in progress go on.

        Raises:
            ApiError: there is none of that name, or it was given at the start.
        """
        if name in self._loaded:
            self._loaded.discard(name)
            self._adapters.remove(name)
        elif name in self._adapters.names():
            raise ApiError(403, f"the adapter '{name}' was given at the start and stays.")
        else:
            text = f"no adapter is named '{name}'."
            raise ApiError(404, text, param="lora_name", code="model_not_found")

    def _folder(self, path: str) -> Path:
        refused = ApiError(
            400,
            f"'{path}' is no PEFT folder below the one that this server may load from.",
            param="lora_path",
        )
        try:
            folder = (self.root / path).resolve()
            files = {*folder.iterdir(), *(folder / file for file in FILES)}
            inside = all(file.resolve(strict=True).is_relative_to(self.root) for file in files)
        except (OSError, ValueError, RuntimeError):  # not there, a zero byte, a loop of links
            raise refused from None
        if not inside:
            raise refused
        return folder


def add_loading(app: FastAPI, service: Service, loading: Loading | None) -> None:
    """The two endpoints; without ``loading`` they say how to get them."""

    def allowed() -> Loading:
        if loading is None:
            text = "adapters are loaded over HTTP only by a server started with --allow-loading."
            raise ApiError(403, text)
        return loading

    @app.post("/v1/load_lora_adapter")
    async def load(body: LoadBody) -> PlainTextResponse:
        place = allowed()
        if body.lora_name == service.base_name:
            raise ApiError(400, f"'{body.lora_name}' is the base's name.", param="lora_name")
        await run_in_threadpool(
            place.load, body.lora_name, body.lora_path, replace=body.load_inplace
        )
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    @app.post("/v1/unload_lora_adapter")
    async def unload(body: UnloadBody) -> PlainTextResponse:
        allowed().unload(body.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")
