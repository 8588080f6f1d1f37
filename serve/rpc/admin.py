"""The gRPC service `classer.v1.ModelAdmin`: changes the models of a running server."""

from __future__ import annotations

import asyncio

import grpc.aio

from ...data.errors import InputError
from ..core.models import Model, Models
from ..ops.guard import audit
from ..ops.log import log_failure, logger
from ..proto import classifier_pb2 as pb
from ..proto.classifier_pb2_grpc import ModelAdminServicer
from ..wire.errors import NotPossible
from .describe import model_message
from .lifecycle import Lifecycle


class ModelAdminService(ModelAdminServicer):
    """`classer.v1.ModelAdmin`, on the event loop of its `Models`.

    Attributes:
      calls: the calls that run; ready once the first models are warm.
    """

    def __init__(self, models: Models) -> None:
        self._models = models
        self.calls = Lifecycle(ready=False)
        self._tasks: set[asyncio.Task[Model]] = set()

    async def ListBundles(
        self, request: pb.ListBundlesRequest, context: grpc.aio.ServicerContext
    ) -> pb.ListBundlesResponse:
        return pb.ListBundlesResponse(bundles=sorted(self._models.folders))

    async def LoadModel(self, request: pb.LoadModelRequest, context: grpc.aio.ServicerContext) -> pb.Model:
        with self.calls.call():
            self._audit(bundle=request.bundle, model=request.name or request.bundle)
            # Shielded: a swap ends even if the caller has gone.
            task = asyncio.create_task(self._load(request))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            model = await asyncio.shield(task)
            audit(version=model.version)
        return model_message(model, self._models, labels=True)

    async def UnloadModel(
        self, request: pb.UnloadModelRequest, context: grpc.aio.ServicerContext
    ) -> pb.UnloadModelResponse:
        with self.calls.call():
            self._audit(model=request.name, version=request.version)
            self._models.unload(request.name, request.version)
            logger.info("unloaded model %s version %s", request.name, request.version)
        return pb.UnloadModelResponse()

    async def SetDefaultVersion(
        self, request: pb.SetDefaultVersionRequest, context: grpc.aio.ServicerContext
    ) -> pb.Model:
        with self.calls.call():
            self._audit(model=request.name, version=request.version)
            model = self._models.set_default(request.name, request.version)
            logger.info("model %s answers with version %s", request.name, request.version)
        return model_message(model, self._models, labels=True)

    def _audit(self, **given: str) -> None:
        """Adds known names to the call's audit line; others, which may hold anything, are logged as "unknown"."""
        bundles = self._models.folders.keys()
        known = {"bundle": bundles, "model": bundles, "version": {model.version for model in self._models}}
        audit(**{field: value if value in known[field] else "unknown" for field, value in given.items()})

    async def _load(self, request: pb.LoadModelRequest) -> Model:
        try:
            model = await self._models.load(
                request.bundle, request.name, default=not request.keep_default, keep_old=request.keep_old
            )
        except InputError as error:
            # The sentence names files of this machine: it belongs in the log, not in the response.
            logger.error("The bundle '%s' cannot be used: %s", request.bundle, error)
            raise NotPossible(
                "The bundle cannot be used; the server's log says why. What was served before still is."
            ) from None
        except MemoryError as error:
            log_failure("There is no memory for the bundle", error)
            raise NotPossible("There is no memory left for the bundle. What was served before still is.") from None
        logger.info("loaded model %s version %s", model.name, model.version)
        return model
